"""What every trainer here shares, of texts or images: metrics, progress, resume, cache shards, model cards."""
