"""An HTTP server that speaks OpenAI's interface over the decoding of rows (`linearize.decode.slots`)."""
