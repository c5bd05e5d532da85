"""The graph passes: graph in, graph out, one rewrite per file.

A pass sees fake tensors only, opens no file and prints nothing. `pipeline` holds their order.
"""
