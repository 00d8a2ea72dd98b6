"""The kit that every page is made of: safe text, charts, tables, and one self-contained HTML file. Free of torch."""
