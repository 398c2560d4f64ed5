"""What a checkpoint can become: a classifier, a backbone, a detector or a segmenter; one file each."""
