"""How things are drawn: pictures with labels, charts, and the page that holds them."""
