"""Everything that may go wrong, by id, with what must then happen. A test that shows it carries `fault("ID")`.

`test_faults.py` fails where a line of `REQUIRED` has no test and no line in `OPEN`, or where a test names no line.
"""

REQUIRED = {
    # interruption and storage
    "A1": "Killed while a checkpoint is written: the newest whole one is taken, the broken one set aside and named.",
    "A2": "SIGTERM finishes the step, saves, exits 143, resumes bit for bit; a second stops at once; others hear it.",
    "A3": "SIGTERM to one of several processes: all save the same step.",
    "A4": "A full disk: said before the first step, or exit 6 with the last whole checkpoint left and nothing half there.",
    "A5": "A folder that cannot be written is refused before anything is loaded.",
    "A6": "A second run in the same folder is refused with the holder's name; a killed holder holds nothing.",
    "A7": "A folder with another run in it is refused, with how to go on.",
    "A8": "A finished run that is started again does nothing, and exits 0 (or as its gate said); another run is refused.",
    "A9": "Out of memory says what strategies hold; trying smaller batches from moved weights is refused.",
    "A10": "Old checkpoints are deleted only after the new one is whole; never the best one, nor what others wrote.",
    "A11": "Power fails: files, folders and then the commit are flushed in this order.",
    # whose state it is
    "B1": "State that was cut or changed by a bit is refused by name; so is any file of a checkpoint.",
    "B2": "Other weights of the same shapes below an adapter, or under a memory, are refused.",
    "B3": "Other layers: names that are missing, unknown or reshaped are listed.",
    "B4": "Another tokenizer or chat template is refused.",
    "B5": "An adapter on other modules is refused before its optimizer is loaded.",
    "B6": "Another rank, alpha, dropout or base of an adapter is refused.",
    "B7": "State is fp32 whatever the weights are; a base or weights in another dtype are refused.",
    "B8": "Another number of processes goes on only with as many rows per step, and is said not to be bit for bit.",
    "B9": "Other rows, order, seed, rows per step, settings, optimizer or loss are refused; what a checkpoint overrules is said.",
    "B10": "A checkpoint without optimizer, schedule or generators is never gone on from in silence.",
    "B11": "A checkpoint of full weights does not go on as an adapter, nor the other way round.",
    "B12": "State of a newer format is refused by version; that of the first release still loads.",
    "B13": "State of another step is refused; finishing twice counts nothing twice.",
    # plugins
    "C1": "A strategy that the checkpoint has and the run lacks, or the other way round, is an error with its name; a published one with its version.",
    "C2": "A strategy that raises is named with version, hook and step, exit 7; a figure costs a warning; the model is kept.",
    "C3": "A broken plugin that nobody asked for costs a warning.",
    "C4": "Two distributions with one name are an error that names both.",
    "C5": "A misspelt hook is an error.",
    "C6": "A hook that asks for what there is not is an error with what to write.",
    "C7": "A plugin of another API is refused before it is imported.",
    "C8": "Strategies that cannot go together refuse each other; those that add give the same in any order.",
    "C9": "A strategy that draws from the global generator is caught.",
    "C10": "Plugins can be blocked by name, or all at once.",
    # numbers and models
    "D1": "A loss or gradient that is not finite stops before the update; weights and state that are not are never saved.",
    "D2": "Importances that are not finite are refused with the weight's name.",
    "D3": "Gradients that were clipped are undone, or refused, by who needs them whole.",
    "D4": "4-bit weights train with what can; what cannot refuses.",
    "D5": "Tied weights count once.",
    "D6": "Experts that no row reached hold nothing, and the share of weights that is held is said.",
    "D7": "Weights without a gradient are left alone.",
    "D8": "Under FSDP2 state is sharded as the weights are.",
    "D9": "DeepSpeed is refused by name where it would break a strategy: without ZeRO, and under ZeRO-3.",
    "D10": "Models that the Trainer spreads by itself are not resumed with strategies.",
    "D11": "Nothing trainable, strengths that are none, and empty importances are refused.",
    # data
    "E1": "No rows: said with the name of the file.",
    "E2": "Malformed lines have file, line, column and an excerpt; the first of many are listed.",
    "E3": "Keys that stand twice, lone surrogates and bytes that are not UTF-8 are refused with their line.",
    "E4": "A field that changes its type is refused with its line.",
    "E5": "Unknown columns: what was found, what was expected, what is nearest.",
    "E6": "None, and empty lists of messages, are refused with their row.",
    "E7": "Chats without a template say what to type.",
    "E8": "Rows whose supervised tokens were cut off are counted, with share and first numbers; if all are, nothing trains.",
    "E9": "Nothing supervised is an error, packed or not, in each task.",
    "E10": "An empty completion is refused; rows that do not train are counted by reason.",
    "E11": "The share of tokens that carry loss is shown; of chats only the assistant's turns are measured.",
    "E12": "Token ids and labels that the model does not have are refused.",
    "E13": "Two tasks of one name are refused, however they are spelt.",
    "E14": "Emoji, right-to-left text and control characters are kept, and shown harmlessly.",
    "E15": "A line of 5 MB is read in seconds.",
    # security and privacy
    "F1": "State is never unpickled, and pickles are never taken for state.",
    "F2": "Resuming under a torch whose loader is known to be unsafe is warned of.",
    "F3": "Code that a model brings does not run unless it was allowed.",
    "F4": "A checkpoint never installs or imports a plugin.",
    "F5": "Text from data never becomes markup.",
    "F6": "Text from data never becomes a formula of a spreadsheet.",
    "F7": "No name of a task, strategy or tensor, and no link among checkpoints, leads out of its folder.",
    "F8": "Tokens reach no file and no output.",
    "F9": "Rows that are kept of a user's data are for that user alone to read.",
    "F10": "Huge headers, deep JSON and files that claim too much are refused in seconds.",
}

OPEN = {
    "A11": "Written in this order, and never tried: no machine here loses its power.",
    "D10": "No model here is spread by the Trainer; it refuses to resume those itself.",
}
"""Lines without a test, and why."""

NOT_BUILT = {
    "--drop-state": "A run without one of its strategies is another run: it begins from the checkpoint's weights (C1).",
    "--allow-tokenizer-change": "Nor does a run go on with other tokens (B4).",
    "--allow-data-change": "Nor with other rows, whose order the checkpoint's place in them is of (B9).",
    "--on-nan": "A step that is skipped is one that SI cannot count, and hides a run that diverges (D1).",
    "--allow-drop": "Rows that do not train are counted, with share and reason, and TRL's own runs go on (E8).",
    "--column-map": "`template` and `completion` of a task make its columns of any others (E5).",
    "--required-plugins": "`plugins` of a file are required: without one of them nothing starts (C10).",
    "--max-line-bytes": "A line of any length is read in the time that its bytes take (E15).",
    "--i-trust-this-checkpoint": "The one who resumes is warned; a switch would be typed once and copied (F2).",
    "--push-state": "What is pushed beside the model is said, and no rows that were kept are among it (F9).",
}
"""Flags that were thought of, and why there is none."""
