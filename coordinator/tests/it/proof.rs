//! What every saga must survive, one fault at a time.
//!
//! A [`Play`] is one way through a saga. It is played once without a fault, to learn what is met on the way; then again
//! for every moment that was met and every fault that can happen there, and the world must come to the same end and be
//! clean. A process that stops is given up and another takes over; when all is over it wakes, and must change nothing any
//! more. Which deeds there are is the plans' word: one that no play meets fails the proof, and a new step that a play
//! does meet is covered with no new test.

pub mod faults;
mod plays;
mod stage;

use std::{
    collections::{BTreeSet, HashMap},
    thread,
};

use coordinator::{
    Plans,
    engine::{Saga, plan::Plan},
};
use faults::{Fault, Faults, Moment, Place};
use plays::Play;
use stage::{Reported, config};

type Deeds = BTreeSet<(&'static str, &'static str)>;

#[test]
fn every_saga_survives_every_fault_at_every_step() {
    let met: Deeds = thread::scope(|scope| {
        let start = |play: &Play| {
            let (play, thread) = (*play, thread::Builder::new().name(format!("{play:?}")));
            thread.spawn_scoped(scope, move || survive(play)).expect("a thread can be started")
        };
        let plays: Vec<_> = Play::ALL.iter().map(start).collect();
        plays.into_iter().flat_map(|play| play.join().expect("a play is survived")).collect()
    });
    let plans = Plans::new(&config());
    let all: Deeds = deeds(&plans.orders).chain(deeds(&plans.refunds)).collect();
    let unmet: Vec<_> = all.difference(&met).collect();
    assert!(unmet.is_empty(), "no play meets {unmet:?}");
}

/// Every deed of a plan, as faults name it.
fn deeds<S: Saga>(plan: &Plan<S>) -> impl Iterator<Item = (&'static str, &'static str)> {
    plan.deeds().map(|deed| (S::KIND, deed.name))
}

/// Plays with every fault at every moment. Answers the deeds that were met.
fn survive(play: Play) -> Deeds {
    let clean = Faults::none();
    assert_eq!(run(play, &clean), Reported::Nothing, "{play:?} without a fault");
    let mut met = BTreeSet::new();
    for moment in ends(clean.met()) {
        for fault in Fault::at(&moment.place) {
            survive_one(play, &moment, *fault);
        }
        if let Place::Deed(kind, name) = moment.place {
            met.insert((kind, name));
        }
    }
    met
}

/// The first and the last time that each place was met: a question that is asked again and again is the same in between.
fn ends(met: Vec<Moment>) -> impl Iterator<Item = Moment> {
    let times: HashMap<Place, usize> = met.iter().map(|moment| (moment.place.clone(), moment.before)).collect();
    met.into_iter().filter(move |moment| moment.before == 0 || moment.before == times[&moment.place])
}

fn survive_one(play: Play, moment: &Moment, fault: Fault) {
    println!("{play:?} with {fault:?} at {moment:?}");
    let faults = Faults::arm(moment.clone(), fault);
    let reported = run(play, &faults);
    assert!(faults.struck(), "it was never met");
    let Place::Deed(_, name) = moment.place else {
        return assert_eq!(reported, Reported::Nothing);
    };
    // It failed there and nowhere else: that step is what an operator reads.
    let names_it = |error: &String| error.starts_with(&format!("{name}: "));
    let (blamed, sent_back) = faults.blamed();
    assert!(blamed.iter().all(names_it), "{blamed:?}");
    match (fault, reported) {
        (Fault::FailOn, Reported::Stuck(error)) => assert!(names_it(&error), "{error}"),
        (Fault::FailOn, Reported::Waiting) => assert!(sent_back),
        (Fault::FailOn, Reported::Nothing) => panic!("nobody was told"),
        (Fault::Fail | Fault::Forget, Reported::Nothing) => assert!(sent_back || !blamed.is_empty()),
        (_, reported) => assert_eq!((reported, blamed, sent_back), (Reported::Nothing, Vec::new(), false)),
    }
}

/// Whatever was started for a play ends with it.
fn run(play: Play, faults: &Faults) -> Reported {
    mesh::chance::seed(0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(play.run(faults))
}
