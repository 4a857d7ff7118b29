"""Everything a person reads: words, tables, plots, pages, cards."""
