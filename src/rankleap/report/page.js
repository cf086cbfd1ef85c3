const charts = JSON.parse(document.getElementById("charts").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
let drawn = [];
async function draw() {
  drawn.splice(0).forEach(chart => chart.finalize());
  const theme = dark.matches ? "dark" : "light";
  const options = {actions: false, renderer: "svg", config: charts.themes[theme], tooltip: {theme: theme}};
  for (const [id, spec] of Object.entries(charts.specs)) {
    drawn.push(await vegaEmbed(document.getElementById(id), spec, options));
  }
}
dark.addEventListener("change", draw);
draw();
