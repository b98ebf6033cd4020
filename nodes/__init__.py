"""Everything that touches ComfyUI. Each node checks, converts, calls one thing, converts back."""
