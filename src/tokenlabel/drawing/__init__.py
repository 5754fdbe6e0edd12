"""Albums of pictures with maps of classes, as runs write and pages show them, and the page that holds them."""
