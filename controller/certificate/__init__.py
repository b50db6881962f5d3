"""A certified price, its certificate, the outlier test, and the drift alarm."""
