"""Write the Python code of deploy/protos/moefleet_v1.proto: `python -m deploy.protos.generate`."""

from cluster.protos.generate import ROOT, compile_proto

PROTO = "deploy/protos/moefleet_v1.proto"

if __name__ == "__main__":
    compile_proto(PROTO, ROOT)
