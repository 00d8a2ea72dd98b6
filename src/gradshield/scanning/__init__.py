"""From a file of rows to the rows that stay: scan, cut, show, estimate, and the page of a scan."""
