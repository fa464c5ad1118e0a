"""The studio as a Hugging Face Space."""

from mar.app import launch

launch(host="0.0.0.0", port=7860)
