"""The control channel: protobuf messages, gRPC stubs, and their translation to the values of `kvserve_api`.

`control_pb2*` are generated from `control.proto` by ``make proto``; this part alone needs protobuf and gRPC.
"""
