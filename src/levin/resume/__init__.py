"""Going on exactly: the place in the data and in the run, kept in a checkpoint and found again.

**What is kept.** Beside Lightning's keys a checkpoint holds, under ``levin``: the states of the random generators, the place
in the training and validation data, the gradients of an open accumulation window, the sums of logged values and metrics,
and what the run was in the middle of. ``resume_state.py`` collects that and puts it back; ``checkpoint_tree.py`` is the
whole tree, ``rank_states.py`` what each process has of its own.

**The place in the data** is not a list of samples. What a loader gives follows from the states of the generators when its
epoch begins, so these are kept, with the number of batches that are done with. Going on is the same for every kind of loader:
set the generators back, begin the epoch again, leave out what was seen, set the generators to what they were when the
checkpoint was saved. ``position.py`` does this for one loader or for several that give joint batches, by a *cursor* for each:

=================  ==========================================  =====================================================
cursor             for                                         what was seen
=================  ==========================================  =====================================================
``index``          DataLoader over a map-style data set        its indices are drawn again, nothing is loaded
``iterable``       DataLoader over a stream with state_dict    the stream's state (in each worker) is loaded
``stateful``       any loader with state_dict                  the loader's state is loaded
``replay``         anything else                               is made again and dropped, with a warning
``joint``          several loaders                             each as its own kind says
=================  ==========================================  =====================================================

**The order of samples** (``sampler_state.py``). ``epoch_start`` has the states when the loader began its epoch, and
``order_drawn_at`` those when the sampler was first asked: without workers, that is later. A sampler draws the same order from the
same states, if it draws at the start and from generators that are global or its own; one that keeps more from epoch to epoch
says so by ``state_dict`` and ``load_state_dict``. For samplers that are not torch's a checksum of the indices is kept,
and when the redrawn ones differ, a warning names the sampler. ``order.py`` lists the order of an epoch as all ranks together go through it,
so that another number of ranks, or batches of another size, go on with what is left of it.

**Random augmentation** (``workers.py``, ``worker_state.py``). Workers run ahead of the loop: when a run is saved they have drawn
numbers for batches that nobody has seen. So each leaves its random states in shared memory after every batch
(``worker_states``), and a resumed worker begins with the one after its last batch that was done with. ``workers_started_at`` has the
states from which persistent workers got their seed, perhaps epochs ago. One that has given nothing of its epoch has the state of its
last batch, marked as ``left``, and how often it came to its end since (``num_ended``), which it does again before it begins.
Without workers, batches that the feed took ahead are taken again from the states before each, and so is the end if it was
seen (``in_flight_states``). Generators that data sets hold are found by ``held_generators.py``.

**When.** Nothing is read per batch but where the numbers could not be known otherwise: by workers, and before batches that are taken ahead.
Everything else is read when an epoch begins and when a checkpoint is saved. An epoch begins as a
whole or not at all: until its iterator is there, the place is the one before, and the generators are set back when it fails
(a signal to all processes may end a worker that is being started).

**In the middle of something.** A checkpoint that a hook saved is saved between the hooks of one moment, or in a validation. The counters
and ``InterruptedPhase`` say which hooks are left; a validation is begun again from the states that it began with.

**What is not exact, and says so at run time**: samplers that draw from global generators in the middle of an epoch or hide
what they keep; another number of workers (order exact, augmentation not); another number of ranks or batch size (every sample still once,
where the order is known); iterables without a state that draw nothing again; states of workers too large for their memory;
loaders with ``in_order=False``.
"""
