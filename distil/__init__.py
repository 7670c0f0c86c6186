"""Everything that is not a script: small modules, and a folder for each job (docs/architecture.md)."""
