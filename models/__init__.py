"""Everything that touches a disk, a network or an ONNX session. Folders are given, never asked for."""
