"""Who says what every location of an image shows, and the way of a whole data set through them into a store."""
