"""Research on the code that serves; each package has a README with its commands."""
