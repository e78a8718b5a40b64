"""The trial engine: responses and first-token log-probabilities of an edited model, exact and fast (docs/design.md §5).

`reference` is the slow definition, `trial_engine` the fast one, and `self_check` compares them when a model is loaded. A trial
is `prefill` (shared prefix, resumed layers), then `decode` (finished rows leave the batch; `drafts` propose tokens), on
`forward` passes over a `kv_cache`; `layout` places tokens and pads, `stopping` says when a row or a trial is finished,
`responses` turns ids into text, and `batching` halves batches when memory runs out.
"""
