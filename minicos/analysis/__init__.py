"""Questions asked of a video model. One file or small folder for each, with `study(wan, run,
options) -> Result`.

steps         what does the model believe at each step; do all frames settle together?
belief        how far is that from what an ideal observer would believe?
commitment    when is the answer decided?
plant         does a run leave a wrong answer that was put into it?
recall        is what was made up the same when it comes back, and which frame reads which?
behaviours/   perception before action, working memory
noise/        what does noise at a step, or in a frame, destroy?
sweep         the same over boundaries, frame and step counts
counts        how many steps and frames does an answer take?
energy        which tokens is each layer busy with?
attention     where does attention go?
swap/         at which layer does a prompt become an answer?
ensemble/     does it help to average states over seeds?
knockout      what if attention could not flow from here to there? (an intervention)
routes        which routes of a maze does the estimate show? (the demo's picture)
answers       which right answers of one puzzle are alive at each step?

options       what every study can be asked, with its defaults: also the options of its verb
reading       what each verb shows, how to read it, and what to try next: on pages and in --help
result        what a study found, and results.json
claims        what the paper claims, and which number decides; verdicts: how it does
reproduce     the list of all studies; report: the page that they make
tools/        record (run once and keep what is seen), interventions (change a run), cases (what it
              runs on), stats (D, means, tests), intervals, figures, shown (what a page needs
              besides), preview (the estimate of a running step, without the VAE), masks,
              posterior and observer (the ideal observer, as a belief and as a model), readout
              (ridge classifier), controls (the untrained network)

A folder has the intervention (`edit`, `states`, `share`), what is measured of it (`measure`), the
findings (`study`), and its pictures.
"""
