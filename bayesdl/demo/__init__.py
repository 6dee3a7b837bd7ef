"""A whole comparison on embedded data: small networks are trained, wrapped in several methods and compared."""
