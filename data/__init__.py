"""What a training reads: the prepared format, ECG and video files, synthetic ECGs."""
