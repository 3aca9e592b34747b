def print_tables(lines): print(len(lines))
