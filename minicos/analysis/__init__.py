"""Studies of a video model: one file or small folder per question, each with
`study(wan, run, options) -> Result`.

    steps         what does the model predict at each step; do all frames settle together?
    belief        how far is that from the belief of an ideal observer?
    commitment    when is the answer decided?
    plant         does a run correct a wrong answer that was put into it?
    recall        is an invented object the same when it reappears, and which frame reads which?
    behaviours/   perception before action, working memory
    noise/        what does noise at a step, or in a frame, destroy?
    sweep         the same over expert boundaries, frame counts and step counts
    counts        how many steps and frames does an answer take?
    energy        which tokens have the most energy in each layer?
    attention     where does attention go?
    swap/         at which layer does a prompt become an answer?
    ensemble/     does averaging states over seeds help?
    knockout      an intervention: attention cut between two sets of tokens
    routes        which routes of a maze does the estimate show? (the demo's picture)
    answers       which right answers of one puzzle are alive at each step?

Shared files:

    options       the options of every study with their defaults; also the options of its verb
    reading       what each verb shows, how to read it, and what to try next: for pages and --help
    result        the result of a study, and results.json
    claims        the paper's claims, and the number that decides each; verdicts: how it decides
    reproduce     the list of all studies; report: the page that they make
    tools/        record (run once and keep observations), interventions (change a run), cases (what
                  a study runs on), stats (D, means, tests), intervals, figures, shown (additional
                  data for pages), preview (the estimate of a running step, without the VAE), masks,
                  posterior and observer (the ideal observer, as a belief and as a model), readout
                  (ridge classifier), controls (the untrained network)

A folder contains the intervention (`edit`, `states`, `share`), its measurements (`measure`), the
findings (`study`), and its pictures.
"""
