"""Reads run and study directories, gives sentences, figures, tables and one page that works offline.

``headline`` needs nothing beyond rankleap itself; ``write_report`` needs the extra ``report`` for its figures.
"""

from rankleap.report.sentences import headline
from rankleap.report.write import write_report

__all__ = ["headline", "write_report"]
