"""Where models come from: one kind of source a file, all opened by `tcw.source.open_source`."""
