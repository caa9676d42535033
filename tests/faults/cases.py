"""The faults that the project survives: how each is caused, what happens then, and the tests that show it."""

from __future__ import annotations

from dataclasses import dataclass

RECORDING = "tests/faults/test_recording.py"
TRAINING = "tests/faults/test_training.py"
PUBLISHING = "tests/faults/test_publish.py"
ANY_ORDER = "tests/faults/test_stateful_registry.py"
TRACKING = "tests/faults/test_tracking.py"
DVC = "tests/faults/test_dvc.py"
POWER = "tests/faults/test_power_loss.py"
ENDINGS = "tests/faults/test_endings.py"
CHANGES = "tests/faults/test_bundle_changes.py"
SECRETS = "tests/faults/test_secrets.py"
MLFLOW_OUTAGES = "tests/faults/test_mlflow_outages.py"
PREFECT_OUTAGES = "tests/faults/test_prefect_outages.py"
LISTENERS = "tests/faults/test_listeners.py"
DRIVE = "tests/lesa/recording/test_drive.py"
PRUNED = "tests/lesa/recording/test_pruned.py"
SUPERVISOR = "tests/flows/test_supervisor.py"
SIGNS = "tests/flows/test_job_signs.py"
PREFLIGHT = "tests/flows/test_preflight.py"
STORE = "tests/lesa/recording/test_store.py"
RECORD = "tests/lesa/recording/test_record.py"
DATASET = "tests/lesa/recording/test_dataset.py"
MEMORY = "tests/faults/test_out_of_memory.py"
FUZZING = "tests/attacks/test_fuzzing.py"
PROMPTS = "tests/lesa/recording/test_prompts.py"
CHECKPOINT = "tests/lesa/training/test_checkpoint.py"
LOOP = "tests/lesa/training/test_loop.py"
BUNDLE = "tests/lesa/bundle/test_format.py"
PULL = "tests/lesa/test_pull.py"
PARAMS = "tests/lesa/test_params.py"
ATOMIC = "tests/lesa/test_atomic.py"
HOOK = "tests/lesa/sampling/test_hook.py"
ENABLE = "tests/lesa/sampling/test_enable.py"
GATE = "tests/lesa/publishing/test_gate.py"
REGISTRY = "tests/flows/test_registry.py"
ENVIRONMENT = "tests/flows/test_environment.py"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One fault."""

    fault: str
    caused: str
    happens: str
    tests: tuple[str, ...]  # path::function


@dataclass(frozen=True)
class Group:
    name: str
    cases: tuple[Case, ...]


def case(fault: str, caused: str, happens: str, *tests: str) -> Case:
    return Case(fault=fault, caused=caused, happens=happens, tests=tests)


CRASHES = Group(
    "Crashes",
    (
        case(
            "a recorder dies in the middle of a trajectory",
            "SIGKILL at seeded moments, of a plain recorder and of a Ray actor",
            "the trajectory is recorded again; keys and bytes are those of an undisturbed run",
            f"{RECORDING}::test_a_kill_at_any_moment_and_a_rerun_end_as_undisturbed",
            f"{RECORDING}::test_a_killed_flow_a_killed_actor_and_a_hung_one",
        ),
        case(
            "a recorder dies between data and commit",
            "SIGKILL when a named file appears, and anywhere inside commits",
            "a trajectory is whole or absent; a repeated one changes nothing",
            f"{RECORDING}::test_a_kill_while_a_trajectory_is_being_written",
            f"{RECORDING}::test_commits_killed_at_every_point_of_time_are_whole_or_absent",
        ),
        case(
            "the driver dies while recording",
            "SIGKILL of the flow",
            "the next one records what is missing; no Ray process is left",
            f"{RECORDING}::test_a_killed_flow_a_killed_actor_and_a_hung_one",
            "tests/flows/test_ray_guard.py::test_nothing_of_a_killed_session_is_left_and_nobody_else_is_touched",
        ),
        case(
            "a recorder has not the memory for a trajectory",
            "a MemoryError, torch's and the system's words for it, an actor with little memory, SIGKILL each time",
            "the actor is replaced, the batch tried again; after three attempts the key is named, and what takes less",
            f"{MEMORY}::test_whoever_says_it_it_is_the_same_error_with_a_remedy",
            f"{MEMORY}::test_another_error_stays_what_it_is",
            f"{MEMORY}::test_a_death_and_too_little_memory_are_tried_again_and_nothing_else",
            f"{MEMORY}::test_a_recorder_without_memory_is_replaced_and_given_up_by_name",
            f"{MEMORY}::test_one_that_the_system_ends_each_time_is_given_up_by_name",
        ),
        case(
            "faults in any order",
            "record, kill, damage, delete, lose the ledger, change the plan, race, train and publish, drawn at random",
            "nothing partial is listed, nothing damaged is read, a recording ends with the undisturbed bytes",
            "tests/faults/test_stateful.py::test_a_store_under_faults_in_any_order",
        ),
        case(
            "a process samples for long",
            "plain, accelerated and adaptive runs in turn",
            "no tensor and no memory more than after the first ones, the same latents",
            "tests/lesa/sampling/test_long_runs.py::test_a_thousand_samples_leave_nothing_behind",
        ),
        case(
            "a trainer dies at any step, also while it saves",
            "SIGKILL at iterations and inside a checkpoint, again and again, in both trainings",
            "it goes on from the newest whole checkpoint; the final weights are those of an undisturbed run",
            f"{TRAINING}::test_killed_at_an_iteration",
            f"{TRAINING}::test_killed_at_any_moment",
            f"{TRAINING}::test_killed_inside_a_checkpoint",
            f"{TRAINING}::test_killed_again_and_again",
            f"{TRAINING}::test_a_torn_newest_checkpoint_costs_two_iterations",
            f"{TRAINING}::test_a_changed_setting_never_goes_on_from_the_old_checkpoint",
        ),
        case(
            "what a dead process left half written",
            "partial folders of dead and of living processes",
            "swept under the lock, never counted, never in DVC's hash",
            f"{ATOMIC}::test_partials_of_dead_processes_are_swept_and_those_of_the_living_stay",
            f"{STORE}::test_unfinished_work_counts_as_absent_and_strangers_are_named",
            f"{CHECKPOINT}::test_what_a_dead_process_left_is_swept",
        ),
        case(
            "a publisher dies while it writes the bundle, registers, or between the record and the aliases",
            "SIGKILL at seeded moments of all that it does, before each of its writes; an exception at each alias",
            "run again it ends as undisturbed: versions, aliases, history, bundle; nothing half written stays",
            f"{PUBLISHING}::test_a_publisher_killed_at_any_moment_and_run_again_ends_as_undisturbed",
            f"{PUBLISHING}::test_a_publisher_killed_before_any_of_its_writes_ends_as_undisturbed",
            f"{REGISTRY}::test_a_publisher_that_died_between_record_and_aliases_is_made_good",
        ),
        case(
            "SIGTERM and Ctrl-C",
            "signals to a stage and to `make repro`",
            "one line, 143 or 130, and everything that was committed stays",
            f"{ENVIRONMENT}::test_sigterm_ends_a_stage_with_143",
            f"{ENDINGS}::test_a_signal_while_ray_runs",
            "tests/flows/test_repro.py::test_who_ends_takes_dvc_and_its_stage_along",
        ),
        case(
            "power fails before writes are on disk",
            "the order of writes, syncs and renames is recorded and checked",
            "everything is synced before the rename that commits it",
            f"{RECORDING}::test_everything_is_synced_before_the_rename_that_commits_it",
            f"{POWER}::test_the_model_loses_what_is_not_synced",
            f"{POWER}::test_a_bundle_is_the_old_one_the_new_one_or_not_there",
            f"{POWER}::test_a_checkpoint_is_whole_and_the_one_before_it_stays_until_it_is",
            f"{POWER}::test_a_catalogue_and_a_ledger_are_the_old_or_the_new",
            f"{POWER}::test_a_trajectory_on_its_way_out_of_the_store_or_back_is_never_torn",
        ),
        case(
            "two recorders on one store",
            "two processes at once",
            "the second is told the first one's pid; a dead one's lock is taken over",
            f"{RECORDING}::test_the_second_recorder_is_told_who_the_first_is",
            f"{RECORDING}::test_two_writers_of_one_trajectory_make_one",
        ),
        case(
            "an actor hangs",
            "SIGSTOP",
            "replaced after its time; given up by name after several",
            f"{RECORDING}::test_a_killed_flow_a_killed_actor_and_a_hung_one",
            "tests/flows/test_record.py::test_a_trajectory_that_never_ends_is_given_up_by_name",
        ),
        case(
            "an accelerated run breaks in its middle",
            "an exception in a step",
            "the next run is that of a fresh process",
            f"{HOOK}::test_state_is_reset_after_an_exception",
            f"{ENABLE}::test_a_broken_run_does_not_reach_the_next",
        ),
        case(
            "two retrainings overlap",
            "a second one while the first holds the lock",
            "one at a time; the second says who is at work",
            "tests/flows/test_repro.py::test_one_at_a_time",
        ),
        case(
            "the Prefect server dies or hangs while a stage runs",
            "SIGKILL and SIGSTOP of the server",
            "the stage ends soon after its work and says how",
            f"{ENDINGS}::test_the_prefect_server_is_gone",
            f"{ENDINGS}::test_a_signal_when_the_prefect_server_hangs",
        ),
        case(
            "the network to the Prefect server is slow, cut, or lies while a stage runs",
            "a proxy that delays, hangs, refuses and comes back, answers errors, other text or nothing, loses answers",
            "the exit code is the work's, within seconds of its end; what comes back in time is noted",
            f"{PREFECT_OUTAGES}::test_a_server_that_fails_while_a_stage_works",
            f"{PREFECT_OUTAGES}::test_a_slow_server_and_one_that_comes_back_note_the_run",
        ),
        case(
            "a Prefect server that lets no run begin",
            "a proxy that refuses, hangs, answers errors or other text from the start",
            "one line with the address and the remedy, before any work",
            f"{PREFECT_OUTAGES}::test_a_server_that_lets_no_run_begin_is_named_before_any_work",
        ),
        case(
            "`dvc repro` dies in the middle",
            "SIGKILL of DVC and of the stage that it runs, at seeded moments, of one stage and of the whole pipeline",
            "the next one does what is missing; lock file, store and weights are those of an undisturbed run",
            f"{DVC}::test_killed_in_the_middle_it_goes_on",
            f"{DVC}::test_killed_at_any_moment_it_goes_on",
            f"{DVC}::test_the_whole_pipeline_killed_at_any_moment_goes_on",
        ),
        case(
            "who started a command dies, or the command does not hear",
            "SIGKILL of the asker, a command that ignores signals",
            "the whole group ends, by force where it must",
            f"{SUPERVISOR}::test_a_killed_asker_is_as_good_and_the_next_one_waits",
            f"{SUPERVISOR}::test_what_does_not_hear_is_forced",
        ),
        case(
            "a job stops or gives no sign",
            "SIGSTOP, a job that reports nothing any more",
            "found, said on the screen and ended; one that reports is left alone",
            f"{SIGNS}::test_a_stopped_process_is_found_and_ended",
            f"{SIGNS}::test_a_job_that_reports_nothing_any_more_is_ended",
            f"{SIGNS}::test_a_job_that_reports_is_left_alone",
        ),
    ),
)
BYTES = Group(
    "Disk and bytes",
    (
        case(
            "files of any content",
            "seeded changes of bytes and of meaning to manifests, weights, stores, what lies beside them, params.yaml",
            "read with the same meaning or refused in words, in bounded time",
            f"{FUZZING}::test_manifests",
            f"{FUZZING}::test_weights_that_a_manifest_vouches_for",
            f"{FUZZING}::test_stores",
            f"{FUZZING}::test_what_lies_beside_a_store",
            f"{FUZZING}::test_saved_predictors",
            f"{FUZZING}::test_parameter_files",
        ),
        case(
            "the disk is full",
            "a small tmpfs and /dev/full, for trajectory and checkpoint",
            "an error with path and need; nothing is committed; afterwards the same bytes",
            f"{RECORDING}::test_a_full_disk_surfaces_and_leaves_nothing_committed",
            f"{TRAINING}::test_a_full_disk_says_so_and_keeps_what_was_saved",
            "tests/faults/test_full_disk.py::"
            "test_what_was_there_survives_and_what_was_meant_is_written_once_there_is_room",
            f"{RECORD}::test_a_disk_that_cannot_hold_it_is_refused_before_anything_is_recorded",
        ),
        case(
            "a flipped byte or a truncated shard of a committed trajectory",
            "every seventeenth byte, every boundary",
            "named by key and step; never trained on",
            f"{STORE}::test_a_flipped_byte_anywhere_is_found",
            f"{STORE}::test_a_truncated_or_longer_shard_is_refused_before_it_is_read",
            f"{TRAINING}::test_a_damaged_trajectory_is_named_and_never_trained_on",
        ),
        case(
            "a lost file of a committed trajectory",
            "each file deleted",
            "an error that names it, never zeros",
            f"{STORE}::test_a_missing_file_is_an_error_and_never_zeros",
        ),
        case(
            "metadata that does not fit its record, or is hostile",
            "other shapes and types, 10^15 values, chunks of a terabyte, an index that points elsewhere",
            "refused from the document, before anything is allocated",
            f"{STORE}::test_hostile_array_metadata_is_refused",
            f"{STORE}::test_a_larger_shape_than_the_file_holds_is_refused_by_size",
            f"{STORE}::test_an_index_that_points_elsewhere_is_refused",
        ),
        case(
            "another Zarr format, or a codec that runs code",
            "version 2 arrays, pickle filters, unknown codecs",
            "refused unread",
            f"{STORE}::test_a_version_2_array_is_refused",
            f"{STORE}::test_hostile_array_metadata_is_refused",
        ),
        case(
            "links, FIFOs and devices in a store or bundle",
            "each put in a file's place",
            "refused",
            f"{STORE}::test_links_and_special_files_are_refused",
            f"{BUNDLE}::test_attack",
        ),
        case(
            "a folder that cannot be written",
            "no permission",
            "one clear error, nothing half written",
            f"{RECORDING}::test_a_store_that_cannot_be_written_is_one_clear_error",
        ),
        case(
            "other orders, other numbers of workers",
            "the same work in other orders",
            "the same bytes and weights",
            f"{RECORD}::test_bytes_do_not_depend_on_order_or_history",
            f"{STORE}::test_two_stores_of_the_same_trajectories_are_the_same_bytes",
            "tests/flows/test_record.py::test_the_stage_records_what_a_plain_process_records",
        ),
        case(
            "DVC's lock file or cache is damaged",
            "torn and foreign lock files, a byte of a cached object changed",
            "reported by name, or recorded anew; never taken for a trajectory",
            f"{DVC}::test_a_damaged_lock_file_is_reported_by_name_and_nothing_runs",
            f"{DVC}::test_a_lock_file_that_names_another_store_runs_the_stage_and_nothing_is_recorded",
            f"{DVC}::test_a_damaged_object_of_the_cache_is_not_taken_for_a_trajectory",
            f"{DVC}::test_a_damaged_trajectory_does_not_get_into_the_lock_file",
            f"{PREFLIGHT}::test_a_torn_lock_is_named_with_the_remedy",
        ),
        case(
            "damage met while recording",
            "trajectories and the root damaged before, while and after others are recorded",
            "recorded anew; never in the catalogue",
            f"{DRIVE}::test_a_damaged_trajectory_is_recorded_anew",
            f"{DRIVE}::test_damage_while_others_are_recorded_is_not_catalogued",
            f"{DRIVE}::test_a_damaged_root_is_written_anew",
        ),
        case(
            "a plan that shrinks, and grows again",
            "prompts taken from the settings and given back",
            "what was recorded is set aside and comes back as it was",
            f"{DVC}::test_a_plan_that_shrinks_and_grows_again_costs_nothing",
            f"{PRUNED}::test_they_come_back_as_they_were",
            f"{DRIVE}::test_what_was_damaged_while_it_was_set_aside_is_recorded_anew",
        ),
    ),
)
BUNDLES = Group(
    "Bundles",
    (
        case(
            "truncated or flipped weights",
            "cut at every place, bits flipped",
            "refused by digest or by the parser",
            f"{BUNDLE}::test_weights_cut_anywhere_are_refused",
            f"{BUNDLE}::test_any_flipped_bit_is_refused",
        ),
        case(
            "forged weights",
            "other tensors with a manifest that vouches for them",
            "refused by shape; a consistent forgery by a pinned digest alone",
            f"{BUNDLE}::test_attack",
            f"{BUNDLE}::test_a_consistent_forgery_needs_a_pinned_digest",
        ),
        case(
            "code in disguise",
            "pickles, archives, classes given by path, extra files",
            "refused; no canary file appears",
            f"{BUNDLE}::test_attack",
        ),
        case(
            "a bundle for another model, scheduler, call or tap",
            "each enabled on a pipeline that it was not made for",
            "refused with every difference; the pipeline is as it was",
            f"{ENABLE}::test_another_model_is_refused_with_every_difference",
            f"{ENABLE}::test_a_call_that_the_bundle_was_not_made_for_is_refused_before_anything_is_computed",
        ),
        case(
            "names that could be paths",
            "dots, slashes, percent signs, NUL, look-alikes, 300 characters",
            "refused before they are joined to anything",
            f"{BUNDLE}::test_names_that_could_be_paths_are_no_names",
        ),
        case(
            "a hostile manifest",
            "double and unknown keys, NaN, 1e999, deep nesting, a gigabyte",
            "refused with the key; size before parsing",
            f"{BUNDLE}::test_attack",
            f"{BUNDLE}::test_no_single_change_of_a_manifest_is_more_than_a_refusal",
        ),
        case(
            "numbers that are none, and inputs beyond what was trained on",
            "NaN weights, features that explode",
            "load refused; a full step instead, counted",
            f"{HOOK}::test_an_unusable_prediction_becomes_a_full_step_and_is_counted",
            f"{BUNDLE}::test_attack",
        ),
        case(
            "another schema",
            "newer and older ones",
            "newer: refused with both numbers; older: read, or the peers decide",
            f"{BUNDLE}::test_attack",
            "tests/flows/test_publish.py::test_after_the_format_has_changed_the_peers_decide",
        ),
        case(
            "a bundle whose files change while it is read, or after",
            "files overwritten between any two steps of reading",
            "the bytes that were verified are the bytes that are used",
            f"{CHANGES}::test_files_that_change_after_they_were_read_change_nothing",
            f"{CHANGES}::test_weights_that_change_after_the_manifest_was_read_are_refused",
            f"{CHANGES}::test_a_loaded_bundle_does_not_read_its_files_again",
            f"{CHANGES}::test_a_bundle_that_is_rewritten_all_the_time_is_the_pinned_one_or_refused",
        ),
    ),
)
INPUT = Group(
    "Parameters and data",
    (
        case(
            "wrong settings",
            "unknown, misspelt, double, of another type; bombs; tags that name code",
            "every problem by its path, before anything starts",
            f"{PARAMS}::test_one_wrong_value",
            f"{PARAMS}::test_hostile_yaml",
            f"{PARAMS}::test_all_problems_come_together",
        ),
        case(
            "impossible schedules",
            "histories too long, no steps, intervals that do not fit",
            "refused with the inequality written out; an interval of one is plain sampling",
            "tests/lesa/test_schedule.py::test_refusals",
            f"{HOOK}::test_interval_one_is_plain_sampling_bit_for_bit",
        ),
        case(
            "NaN in recorded features",
            "one step poisoned",
            "refused by key and step; nothing is committed",
            f"{RECORD}::test_poisoned_features_are_refused_by_key_and_step",
        ),
        case(
            "a loss that is not finite",
            "NaN and infinity in loss, gradient, validation",
            "training stops before the update; the last checkpoint is whole",
            f"{LOOP}::test_a_loss_that_is_not_finite_stops_before_the_update",
            f"{LOOP}::test_a_gradient_that_is_not_finite_stops_too",
        ),
        case(
            "too little data, or data that is judged on",
            "no trajectories, overlapping splits",
            "refused with the prompts named",
            f"{DATASET}::test_prompts_without_a_trajectory_are_named",
            f"{PROMPTS}::test_a_prompt_in_two_splits_is_refused",
        ),
        case(
            "odd prompts",
            "empty, long, other scripts, joined characters, double lines",
            "kept exactly, or refused with the line",
            f"{PROMPTS}::test_a_bad_file_is_refused",
            f"{STORE}::test_any_prompt_that_a_set_may_hold_is_read_back",
        ),
        case(
            "another model or code behind an old store",
            "weights, scheduler, encoders changed",
            "other keys: recorded again, the old is not used",
            f"{RECORD}::test_whatever_determines_the_bytes_is_in_the_key",
            f"{RECORD}::test_the_source_changes_with_weights_scheduler_and_encoders",
        ),
    ),
)
OPERATIONS = Group(
    "Tracking, registry, security",
    (
        case(
            "MLflow is down, slow, or answers nonsense while training",
            "a server that refuses, hangs, lies",
            "training goes on; what was not taken is kept and sent once later",
            f"{TRACKING}::test_training_does_not_wait_for_a_broken_server",
            f"{TRACKING}::test_a_sender_that_nobody_needs_ends",
            "tests/flows/test_tracking.py::test_sending_twice_doubles_nothing",
        ),
        case(
            "the network to MLflow fails in the middle of a run, and is well again",
            "a proxy that loses answers, resets, cuts, hangs, refuses, answers errors and other text, at each request",
            "every point, parameter and tag arrives once, without anybody's doing; reporting does not wait",
            f"{MLFLOW_OUTAGES}::test_a_run_arrives_once_whatever_happened_to_the_answers",
            f"{MLFLOW_OUTAGES}::test_after_an_outage_a_run_arrives_by_itself",
        ),
        case(
            "two publishers race for the champion",
            "rounds of two that are killed, on one database and on two machines behind a server",
            "the champion never gets worse, the best ends on top, every promotion was of a better one",
            f"{PUBLISHING}::test_racing_publishers_that_get_killed_leave_the_best_as_champion",
            f"{REGISTRY}::test_of_two_that_judged_against_the_same_champion_one_is_promoted",
        ),
        case(
            "faults of a registry in any order",
            "publish, kill, race, roll back, lift, move and delete aliases, damage files, pull, drawn at random",
            "one champion, rightly promoted; the history only grows, aliases follow it; a pull is intact or refused",
            f"{ANY_ORDER}::test_a_registry_under_faults_in_any_order",
        ),
        case(
            "a candidate that is worse, equal, or measured wrongly",
            "worse and equal ones, NaN, missing samples, figures that its makers claim",
            "never promoted; the gate measures for itself",
            f"{GATE}::test_worse_stays_out_at_the_first_look",
            f"{GATE}::test_a_copy_of_the_champion_stays_out",
            f"{GATE}::test_what_is_not_finite_speaks_against",
            "tests/flows/test_publish.py::test_the_gate_measures_for_itself",
        ),
        case(
            "an answer that was lost",
            "the reply to an alias that was set, to every write of a publication, to all writes of one publisher",
            "what is read back counts: no second version or run, who promoted is told so, the champion gets no worse",
            f"{PUBLISHING}::test_a_lost_answer_is_not_a_lost_race",
            f"{MLFLOW_OUTAGES}::test_what_was_done_without_an_answer_is_not_done_twice",
            f"{MLFLOW_OUTAGES}::test_two_publishers_of_whom_one_never_hears_an_answer",
        ),
        case(
            "an answer that is not about what was asked",
            "an empty one, one about another model, in the registry's name",
            "refused in words; nobody is promoted, nothing of it is pulled",
            f"{MLFLOW_OUTAGES}::test_an_answer_about_something_else_promotes_nobody",
            f"{MLFLOW_OUTAGES}::test_a_cached_champion_is_served_whatever_the_network_says",
        ),
        case(
            "a bundle pulled through a network that drops and lies",
            "every fault of the proxy at every file's download",
            "whole or not there; asked again where it was dropped once",
            f"{MLFLOW_OUTAGES}::test_a_pulled_bundle_is_whole_or_not_there",
        ),
        case(
            "the champion's files are gone or altered",
            "a byte changed in the registry's store",
            "refused by digest; the stage fails and says how to go back",
            f"{PULL}::test_a_bundle_changed_in_the_store_is_refused_and_not_kept",
            "tests/flows/test_publish.py::test_a_champion_that_cannot_be_measured_stays_and_the_stage_fails",
        ),
        case(
            "a rollback, and then the same bundle again",
            "a person's decision, then publishing",
            "kept out until it is lifted",
            f"{REGISTRY}::test_what_was_rolled_back_stays_out_until_it_is_lifted",
            "tests/flows/test_publish.py::test_what_a_person_took_back_is_not_promoted_again",
        ),
        case(
            "code in the base model",
            "indices that name other code, files beside the weights, weights as pickle",
            "never run, refused",
            "tests/lesa/models/test_pipelines.py::test_an_index_that_names_other_code_is_refused",
            "tests/lesa/models/test_pipelines.py::test_code_beside_the_weights_is_never_run",
            "tests/lesa/models/test_pipelines.py::test_weights_as_pickle_are_refused",
        ),
        case(
            "folders that others can write",
            "a cache with open permissions",
            "refused; ours are private",
            f"{PULL}::test_a_cache_that_others_can_write_is_refused",
            "tests/flows/test_tracking.py::test_state_is_private",
        ),
        case(
            "there is no registry",
            "a port that nobody listens on; a database that cannot be read",
            "refused by address and with the remedy within seconds, before hours of work; nothing is created",
            f"{PUBLISHING}::test_publishing_without_a_registry_fails_clearly_and_in_time",
            f"{PREFLIGHT}::test_a_registry_that_cannot_be_read_is_named_before_hours_of_work",
            f"{MLFLOW_OUTAGES}::test_a_registry_that_does_not_answer_is_named_before_any_work",
        ),
        case(
            "others reach what listens",
            "everything of the project runs at once",
            "loopback alone",
            f"{LISTENERS}::test_everything_listens_on_loopback_alone",
            f"{LISTENERS}::test_addresses_as_the_kernel_writes_them",
        ),
        case(
            "secrets in the environment",
            "canaries planted before stages that succeed and fail",
            "none is in anything that they write or say",
            f"{SECRETS}::test_no_canary_is_written_or_said_by_any_stage",
            f"{SECRETS}::test_the_sweep_finds_what_is_there",
        ),
    ),
)
GROUPS = (CRASHES, BYTES, BUNDLES, INPUT, OPERATIONS)
