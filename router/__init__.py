"""Which member serves a request: pure functions of plain data, standard library only."""
