"""What every page is built from: safe text, charts, tables, and one self-contained HTML file. Free of torch."""
