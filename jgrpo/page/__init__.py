"""The page that shows runs: what it says (data, health, pieces), how a browser gets it (server, or
one file: sheet), and what it is made of (assets/)."""
