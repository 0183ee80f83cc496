"""What a run tells about itself: speed, memory, mask maps, its record, and the summary at its end."""
