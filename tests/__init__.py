"""What the tests and the smoke runs of recipes read: small files as other programs write them."""
