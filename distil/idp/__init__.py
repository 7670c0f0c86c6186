"""Documents to JSON (IDP): the prompt, values, schemas, constrained decoding, and the extractor that uses them."""
