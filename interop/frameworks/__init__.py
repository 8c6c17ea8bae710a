"""One file a framework: its adapter, with the rules that read and build its layers."""
