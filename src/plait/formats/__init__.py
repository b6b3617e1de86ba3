"""How weights look on disk, and how what lies there is found and trusted."""
