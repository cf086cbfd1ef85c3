"""``python -m rankleap.cli``, as ``accelerate launch -m`` needs it."""

from rankleap.cli import main

main()
