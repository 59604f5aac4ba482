"""What a run shows: its bar, its speed, TensorBoard, pictures, the closing report."""
