"""Teachers, which predict what every location of an image shows, and the pipeline that labels a data set with one."""
