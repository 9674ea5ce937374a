"""Where images come from: folders, tables, archives, lists."""
