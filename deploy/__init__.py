"""Ray Serve application, OpenAI HTTP, gRPC, tokenizer, configuration and the moefleet command."""
