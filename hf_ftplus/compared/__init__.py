"""Several remedies on the same data, and which of them to take: `ftplus compare`.

    OUT/cells/NAME/seed-42/             an ordinary `ftplus sft` run; ftplus/report.json, ftplus/stage.yaml (what it
                                        was told), ftplus/cell.json (how it ended), ftplus/log.txt
    OUT/probe/                          three steps of the first cell, to predict from
    OUT/compare.json, compare.csv       the figures, and the row that is recommended
    OUT/report.html, .md, .csv          the page of it, with the answers of each row's first seed

candidates   what is typed, as rows of the table
cells        one run for each row and seed, and whether to go on from what is there
processes    run them
plan         what it will take, and what a budget leaves room for
judged       means over seeds, the Pareto front, the recommended row
saved        compare.json, compare.csv
shown        tables
runner       the story: compare()
"""
