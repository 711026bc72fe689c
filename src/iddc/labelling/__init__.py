"""Name clusters on a local web page: the samples it shows and the server behind it."""
