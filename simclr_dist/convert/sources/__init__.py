"""Read images from folders, tables, archives and lists."""
