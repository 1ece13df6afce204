"""The package's main job on real data: codes, retrieval and ranking on MovieLens-1M, measured."""
