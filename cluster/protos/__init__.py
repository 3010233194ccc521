"""Messages between gateways and members; `python -m cluster.protos.generate` writes the code from member.proto."""
