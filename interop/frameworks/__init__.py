"""One file or folder a framework: its adapter, and the rules that read and build its layers."""
