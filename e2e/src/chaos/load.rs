//! Buyers while the mesh is being broken: they come at a steady rate, retry with the same key, pay, decline, cancel or
//! walk away, and hold every answer against the error table of the API.
//!
//! Promises: what was accepted is written down at once, and at the end each of it is asked for; whatever the API does
//! not document is a violation, and so is a final word that is taken back: an order under one key that becomes another,
//! a terminal state that changes, an accepted order that is not found, a sale called sold out that is not (I8).

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::{HeaderValue, Method};
use rand::{Rng, SeedableRng, rngs::StdRng};
use seckill::demo::client::{Answer, Client};
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
};
use uuid::Uuid;

use crate::Site;

/// How long a buyer keeps at one thing. Longer than any fault lasts.
const PATIENCE: Duration = Duration::from_secs(90);
/// Visits at once; who comes beyond that goes home unseen. A mesh that is away must not be met by all who ever came.
const CROWD: usize = 3000;
/// Violations told one by one.
pub const TOLD: usize = 30;
/// Requests under way at once, and those among them that may take their time. Browsers do not share connections: who
/// waits for an order to be locked keeps nobody from placing one.
const REQUESTS: usize = 256;
const WAITS: usize = 2048;

/// What a buyer or an operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verb {
    Place,
    Read,
    Pay,
    Cancel,
    Manage,
}

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Verb::Place => "place",
            Verb::Read => "read",
            Verb::Pay => "pay",
            Verb::Cancel => "cancel",
            Verb::Manage => "manage",
        }
    }
}

/// What an answer means, by the API's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Done,
    Again,
    Final,
    Undocumented,
}

/// Our buyers come once, with one key, for one unit: no answer may speak of a limit, of another payload or of another's
/// order.
fn judge(verb: Verb, status: u16, reason: &str) -> Verdict {
    match (verb, status, reason) {
        (_, 200, _) | (Verb::Place, 202, _) => Verdict::Done,
        (_, 503, "OVERLOADED" | "STOCK_REBUILDING" | "DEPENDENCY_DOWN")
        | (_, 504, "DEADLINE_EXCEEDED")
        | (_, 429, "RATE_LIMITED")
        | (Verb::Place, 429, "ALL_HELD")
        | (Verb::Place, 400, "SALE_NOT_STARTED" | "SALE_PAUSED") => Verdict::Again,
        (Verb::Place, 400, "SOLD_OUT" | "SALE_ENDED")
        | (Verb::Pay, 400, "PAYMENT_DECLINED")
        | (Verb::Pay | Verb::Cancel, 400, "ILLEGAL_STATE") => Verdict::Final,
        _ => Verdict::Undocumented,
    }
}

/// What is known of an accepted order.
#[derive(Clone, Debug, Default)]
struct Known {
    /// The terminal state it was seen in.
    ended: Option<String>,
}

/// Everything that was seen.
#[derive(Debug, Default)]
struct Journal {
    orders: HashMap<String, Known>,
    /// Orders that were locked: when they were accepted, when they were seen to be locked.
    locked: Vec<(Instant, Instant)>,
    answers: BTreeMap<(Verb, String), u64>,
    /// Sales that somebody was told are sold out.
    sold_out: HashSet<String>,
    unseen: u64,
    /// Requests without an answer, and why.
    unanswered: Vec<String>,
    violations: Vec<String>,
}

/// Sales on offer.
#[derive(Clone, Debug, Default)]
struct Offer {
    /// Never runs out: while it is not accepted and locked, the mesh is at fault.
    evergreen: String,
    /// Small ones, that run out.
    flash: Vec<String>,
    /// All there ever were.
    past: Vec<String>,
}

/// One gateway, as a load balancer knows it.
struct Door {
    address: SocketAddr,
    client: Client,
    in_rotation: AtomicBool,
}

/// The buyers, and what they share. Cheap to clone.
#[derive(Clone)]
pub struct Load(Arc<Shared>);

struct Shared {
    site: Site,
    doors: Vec<Door>,
    next_door: AtomicUsize,
    run: String,
    seed: u64,
    operator: HeaderValue,
    offer: Mutex<Offer>,
    journal: Mutex<Journal>,
    /// When the newest order that is locked was accepted.
    frontier: watch::Sender<Option<Instant>>,
    places: Semaphore,
    /// Taken before a door is chosen: who queued for a door would come to it after it was taken out of rotation.
    requests: Semaphore,
    waits: Semaphore,
}

impl Load {
    /// Buyers at these doors. `seed` decides what each of them does.
    pub fn at(doors: &[SocketAddr], seed: u64) -> Result<Self> {
        let site = Site::at(*doors.first().context("a mesh has a door")?);
        let doors = doors.iter().map(|&address| {
            let client = Client::new(&format!("http://{address}").parse()?, REQUESTS + WAITS)?;
            Ok(Door { address, client, in_rotation: AtomicBool::new(true) })
        });
        let operator = bearer(&site, "olga", "operator")?;
        Ok(Self(Arc::new(Shared {
            doors: doors.collect::<Result<_>>()?,
            site,
            next_door: AtomicUsize::new(0),
            run: format!("{:08x}", Uuid::new_v4().as_fields().0),
            seed,
            operator,
            offer: Mutex::default(),
            journal: Mutex::default(),
            frontier: watch::Sender::new(None),
            places: Semaphore::new(CROWD),
            requests: Semaphore::new(REQUESTS),
            waits: Semaphore::new(WAITS),
        })))
    }

    /// Opens the sales.
    pub async fn open(&self) -> Result<()> {
        let evergreen = self.create_sale("evergreen", 10_000_000, Duration::from_secs(4)).await?;
        self.offer().evergreen = evergreen;
        for _ in 0..2 {
            self.new_flash_sale().await?;
        }
        Ok(())
    }

    /// Lets buyers come at this rate, and small sales begin, until `until` resolves; then waits for who is still there.
    pub async fn run(&self, rate: f64, until: impl Future<Output = ()>) {
        tokio::pin!(until);
        let mut visits = JoinSet::new();
        let mut next_buyer = tokio::time::interval(Duration::from_secs_f64(1.0 / rate));
        let mut next_sale = tokio::time::interval(Duration::from_secs(8));
        next_buyer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        next_sale.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut number = 0;
        loop {
            tokio::select! {
                () = &mut until => break,
                _ = next_buyer.tick() => {
                    let load = self.clone();
                    number += 1;
                    visits.spawn(async move {
                        let Ok(_place) = load.0.places.try_acquire() else {
                            load.journal().unseen += 1;
                            return;
                        };
                        load.visit(number).await;
                    });
                }
                _ = next_sale.tick() => {
                    let load = self.clone();
                    // A mesh that is away gets its sale later.
                    visits.spawn(async move { let _ = load.new_flash_sale().await; });
                }
                Some(ended) = visits.join_next() => {
                    if let Err(error) = ended {
                        self.violation(format!("a buyer came to grief: {error}"));
                    }
                }
            }
        }
        while let Some(ended) = visits.join_next().await {
            if let Err(error) = ended {
                self.violation(format!("a buyer came to grief: {error}"));
            }
        }
    }

    /// Waits until an order accepted after `since` is locked; `None` when that takes longer than `limit`.
    pub async fn locks_again(&self, since: Instant, limit: Duration) -> Option<Duration> {
        let mut frontier = self.0.frontier.subscribe();
        let locked = frontier.wait_for(|accepted| accepted.is_some_and(|accepted| accepted >= since));
        tokio::time::timeout(limit, locked).await.ok()?.ok()?;
        Some(since.elapsed())
    }

    /// The longest time between two locks in this stretch: what buyers noticed of a fault.
    pub fn longest_silence(&self, from: Instant, to: Instant) -> Duration {
        let journal = self.journal();
        let mut locks: Vec<_> =
            journal.locked.iter().map(|(_, at)| *at).filter(|at| (from..=to).contains(at)).collect();
        locks.extend([from, to]);
        locks.sort();
        locks.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }

    /// Takes a door out of rotation, as a load balancer does before a restart, or puts it back.
    pub fn rotate(&self, address: SocketAddr, in_rotation: bool) {
        for door in self.0.doors.iter().filter(|door| door.address == address) {
            door.in_rotation.store(in_rotation, Ordering::Relaxed);
        }
    }

    /// The ids of all orders that were accepted so far.
    pub fn accepted(&self) -> HashSet<String> {
        self.journal().orders.keys().map(|name| name.trim_start_matches("orders/").to_owned()).collect()
    }

    /// Nobody waits any longer for what was accepted so far.
    pub fn forget(&self) {
        self.journal().orders.clear();
    }

    /// Something that must not be.
    pub fn violation(&self, what: String) {
        let mut journal = self.journal();
        // The rest is counted.
        if journal.violations.len() < TOLD {
            eprintln!("VIOLATION  {what}");
        }
        journal.violations.push(what);
    }

    /// Everything that must not have been.
    pub fn violations(&self) -> Vec<String> {
        self.journal().violations.clone()
    }

    /// How often which answer came, and how many orders were accepted.
    pub fn summary(&self) -> String {
        let journal = self.journal();
        let mut text = format!("{} orders accepted, {} seen locked", journal.orders.len(), journal.locked.len());
        if journal.unseen > 0 {
            text += &format!(", {} buyers found the shop full", journal.unseen);
        }
        for ((verb, answer), count) in &journal.answers {
            text += &format!("\n  {:<7} {answer:<24} {count:>8}", verb.name());
        }
        text
    }

    /// The requests that got no answer so far, but for the first `known` of them.
    pub fn unanswered(&self, known: usize) -> Vec<String> {
        self.journal().unanswered.iter().skip(known).cloned().collect()
    }

    /// Asks for every accepted order until each is terminal. Answers how many ended how.
    pub async fn all_end(&self, limit: Duration) -> BTreeMap<String, usize> {
        let orders: Vec<(String, Known)> = self.journal().orders.clone().into_iter().collect();
        // Asking takes its time, too, where there are many.
        let deadline = Instant::now() + limit + Duration::from_millis(orders.len() as u64);
        let mut asking = JoinSet::new();
        const LANES: usize = 32;
        for lane in 0..LANES {
            let (load, mine) = (self.clone(), orders.iter().skip(lane).step_by(LANES).cloned().collect::<Vec<_>>());
            asking.spawn(async move {
                let mut ends: BTreeMap<String, usize> = BTreeMap::new();
                for (order, known) in mine {
                    let end = load.end_of(&order, deadline).await;
                    match (&known.ended, &end) {
                        (Some(before), Some(now)) if before != now => {
                            load.violation(format!("{order} was {before} and is {now}"));
                        }
                        (_, None) => load.violation(format!("I5: {order} was accepted and has not ended")),
                        _ => {}
                    }
                    *ends.entry(end.unwrap_or_else(|| "OPEN".to_owned())).or_default() += 1;
                }
                ends
            });
        }
        let mut ends = BTreeMap::new();
        for part in asking.join_all().await {
            for (state, count) in part {
                *ends.entry(state).or_default() += count;
            }
        }
        ends
    }

    /// I8: who was told that a sale is sold out was told the truth.
    pub async fn sold_out_is_sold(&self) {
        let told: Vec<String> = self.journal().sold_out.iter().cloned().collect();
        for sale in told {
            let Some(answer) =
                self.ask(Verb::Manage, &format!("/v1/sales/{sale}/stock"), Instant::now() + PATIENCE).await
            else {
                self.violation(format!("the stock of {sale} cannot be read"));
                continue;
            };
            let stock = answer.json();
            if stock["sold"] != stock["total"] {
                self.violation(format!("I8: {sale} was called sold out: {stock}"));
            }
        }
    }

    /// A sale that is open now.
    pub async fn create_sale(&self, title: &str, stock: u64, window: Duration) -> Result<String> {
        let id = format!("{title}-{}-{}", self.0.run, self.0.next_door.fetch_add(1, Ordering::Relaxed));
        let body = serde_json::json!({
            "saleId": id, "title": title, "stock": stock.to_string(), "perBuyerLimit": "1",
            "price": { "currencyCode": "EUR", "units": "19", "nanos": 990_000_000 },
            "paymentWindow": format!("{}s", window.as_secs_f64()),
        });
        let (token, key) = (self.0.operator.clone(), Uuid::new_v4().to_string());
        let deadline = Instant::now() + PATIENCE;
        match self
            .insist(Verb::Manage, Method::POST, "/v1/sales", &token, Some(&key), &body.to_string(), deadline)
            .await
        {
            Some(answer) if answer.status.is_success() => {}
            Some(answer) => bail!("the sale {id} was refused: {}", answer.json()),
            None => bail!("the sale {id} could not be created"),
        }
        self.offer().past.push(id.clone());
        Ok(id)
    }

    /// All sales there ever were.
    pub fn sales(&self) -> Vec<String> {
        self.offer().past.clone()
    }

    /// One buyer places one order in this sale and waits until it is locked. `None` where it is not.
    pub async fn hold(&self, buyer: &str, sale: &str) -> Option<String> {
        let token = bearer(&self.0.site, buyer, "buyer").ok()?;
        let order = self.acquire(&token, sale).await?;
        let state = self.leaves_placed(&token, &order).await?;
        (state == "AWAITING_PAYMENT").then_some(order)
    }

    /// This many buyers place one order each, `lanes` at a time. Answers how many were accepted.
    pub async fn crowd(&self, sale: &str, buyers: usize, lanes: usize) -> usize {
        let mut placing = JoinSet::new();
        for lane in 0..lanes {
            let (load, sale) = (self.clone(), sale.to_owned());
            placing.spawn(async move {
                let mut accepted = 0;
                for buyer in (lane..buyers).step_by(lanes) {
                    let Ok(token) = bearer(&load.0.site, &format!("{sale}-{buyer}"), "buyer") else { continue };
                    accepted += usize::from(load.acquire(&token, &sale).await.is_some());
                }
                accepted
            });
        }
        placing.join_all().await.into_iter().sum()
    }

    /// The state of an order, once somebody answers.
    pub async fn state(&self, order: &str) -> Option<String> {
        let answer = self.ask(Verb::Read, &format!("/v1/{order}"), Instant::now() + PATIENCE).await?;
        answer.status.is_success().then(|| answer.order().state.to_owned())
    }

    async fn new_flash_sale(&self) -> Result<()> {
        let window = Duration::from_secs(2 + (self.0.next_door.load(Ordering::Relaxed) % 4) as u64);
        let sale = self.create_sale("flash", 120, window).await?;
        let mut offer = self.offer();
        offer.flash.push(sale);
        if offer.flash.len() > 3 {
            offer.flash.remove(0);
        }
        Ok(())
    }

    async fn visit(&self, number: u64) {
        let mut choice = StdRng::seed_from_u64(self.0.seed.wrapping_add(number));
        let Ok(token) = bearer(&self.0.site, &format!("buyer-{}-{number}", self.0.run), "buyer") else { return };
        let sale = {
            let offer = self.offer();
            match offer.flash.len() {
                0 => offer.evergreen.clone(),
                _ if choice.random_bool(0.5) => offer.evergreen.clone(),
                flash => offer.flash[choice.random_range(0..flash)].clone(),
            }
        };
        let Some(order) = self.acquire(&token, &sale).await else { return };
        let Some(state) = self.leaves_placed(&token, &order).await else { return };
        if state != "AWAITING_PAYMENT" {
            return;
        }
        let path = format!("/v1/{order}");
        let answer = match choice.random_range(0..100) {
            0..40 => self.pay(&token, &path, "sim_approve").await,
            40..50 => self.pay(&token, &path, "sim_decline").await,
            50..55 => self.pay(&token, &path, "sim_timeout").await,
            55..60 => {
                // A double click: two keys, one charge (E28).
                tokio::join!(self.pay(&token, &path, "sim_approve"), self.pay(&token, &path, "sim_approve")).0
            }
            60..75 => {
                let deadline = Instant::now() + PATIENCE;
                self.insist(Verb::Cancel, Method::POST, &format!("{path}:cancel"), &token, None, "{}", deadline).await
            }
            _ => None,
        };
        if let Some(answer) = answer.filter(|answer| answer.status.is_success()) {
            self.saw(&order, answer.order().state);
        }
    }

    /// Tries with one key until there is an order, a final word, or no more patience.
    async fn acquire(&self, token: &HeaderValue, sale: &str) -> Option<String> {
        let key = Uuid::now_v7().to_string();
        let body = format!(r#"{{"sale":"{sale}","quantity":1}}"#);
        let deadline = Instant::now() + PATIENCE;
        let place = || self.insist(Verb::Place, Method::POST, "/v1/orders", token, Some(&key), &body, deadline);
        let answer = place().await?;
        if !answer.status.is_success() {
            if answer.reason() == "SOLD_OUT" {
                self.journal().sold_out.insert(sale.to_owned());
            }
            return None;
        }
        let order = answer.order().name.to_owned();
        self.journal().orders.entry(order.clone()).or_default();
        // Some ask again at once, as if the answer had been lost: it is the same order.
        if key.starts_with('0')
            && let Some(again) = place().await
            && again.order().name != order
        {
            self.violation(format!("I10: the key of {order} was answered with {}", again.json()));
        }
        Some(order)
    }

    async fn leaves_placed(&self, token: &HeaderValue, order: &str) -> Option<String> {
        let accepted = Instant::now();
        let path = format!("/v1/{order}{WAIT}");
        loop {
            let deadline = accepted + PATIENCE;
            let answer = self.insist(Verb::Read, Method::GET, &path, token, None, "", deadline).await?;
            if !answer.status.is_success() {
                return None;
            }
            let state = answer.order().state;
            if state != "PLACED" {
                self.saw(order, state);
                if state == "AWAITING_PAYMENT" {
                    self.journal().locked.push((accepted, Instant::now()));
                    self.0.frontier.send_modify(|frontier| *frontier = (*frontier).max(Some(accepted)));
                }
                return Some(state.to_owned());
            }
            if Instant::now() > deadline {
                return None;
            }
        }
    }

    async fn pay(&self, token: &HeaderValue, path: &str, method: &str) -> Option<Answer> {
        let (key, body) = (Uuid::new_v4().to_string(), format!(r#"{{"paymentMethod":"{method}"}}"#));
        let deadline = Instant::now() + PATIENCE;
        self.insist(Verb::Pay, Method::POST, &format!("{path}:pay"), token, Some(&key), &body, deadline).await
    }

    async fn end_of(&self, order: &str, deadline: Instant) -> Option<String> {
        while Instant::now() < deadline {
            let answer = self.ask(Verb::Read, &format!("/v1/{order}"), deadline).await?;
            let state = answer.order().state;
            if is_terminal(state) {
                return Some(state.to_owned());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        None
    }

    /// The operator reads.
    async fn ask(&self, verb: Verb, path: &str, deadline: Instant) -> Option<Answer> {
        let token = self.0.operator.clone();
        self.insist(verb, Method::GET, path, &token, None, "", deadline).await
    }

    /// Asks at one door after the other until there is a final answer. Only for what is safe to repeat, which is
    /// everything here.
    #[expect(clippy::too_many_arguments, reason = "a request and how long to try")]
    async fn insist(
        &self,
        verb: Verb,
        method: Method,
        path: &str,
        token: &HeaderValue,
        key: Option<&str>,
        body: &str,
        deadline: Instant,
    ) -> Option<Answer> {
        let mut pause = Duration::from_millis(100);
        loop {
            // The operator has a connection of his own: what he asks must not wait until a crowd is served.
            let turn = match path.ends_with(WAIT) {
                _ if token == self.0.operator => None,
                true => self.0.waits.acquire().await.ok(),
                false => self.0.requests.acquire().await.ok(),
            };
            let door = self.next_door();
            let content = (!body.is_empty()).then(|| Bytes::copy_from_slice(body.as_bytes()));
            let answer = door.client.send(method.clone(), path, token, key, content).await;
            drop(turn);
            match answer {
                Ok(answer) => {
                    let success = answer.status.is_success();
                    let reason = if success { answer.status.as_u16().to_string() } else { answer.reason() };
                    self.count(verb, &reason);
                    let verdict = judge(verb, answer.status.as_u16(), &reason);
                    if matches!(answer.status.as_u16(), 429 | 503) && answer.retry_after.is_none() {
                        self.violation(format!("{} {path}: {reason} without Retry-After", verb.name()));
                    }
                    match verdict {
                        Verdict::Done | Verdict::Final => return Some(answer),
                        Verdict::Again => {}
                        Verdict::Undocumented => {
                            let body = String::from_utf8_lossy(&answer.body).into_owned();
                            self.violation(format!("{} {path}: {} {body}", verb.name(), answer.status));
                            return None;
                        }
                    }
                }
                Err(error) => {
                    self.count(verb, NO_ANSWER);
                    self.journal().unanswered.push(format!("{} {path} at {}: {error:#}", verb.name(), door.address));
                }
            }
            if Instant::now() + pause > deadline {
                return None;
            }
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.5))).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// One after the other, of those in rotation.
    fn next_door(&self) -> &Door {
        let doors = &self.0.doors;
        let next = self.0.next_door.fetch_add(1, Ordering::Relaxed);
        let in_turn = (0..doors.len()).map(|step| &doors[(next + step) % doors.len()]);
        in_turn.clone().find(|door| door.in_rotation.load(Ordering::Relaxed)).unwrap_or(&doors[next % doors.len()])
    }

    fn count(&self, verb: Verb, answer: &str) {
        *self.journal().answers.entry((verb, answer.to_owned())).or_default() += 1;
    }

    fn saw(&self, order: &str, state: &str) {
        if is_terminal(state) {
            self.journal().orders.entry(order.to_owned()).or_default().ended = Some(state.to_owned());
        }
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.0.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offer(&self) -> MutexGuard<'_, Offer> {
        self.0.offer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a read wait for an order to be locked.
const WAIT: &str = "?wait=2s";

/// The door was shut, or the connection broke: whether it happened is unknown.
const NO_ANSWER: &str = "no answer";

fn bearer(site: &Site, sub: &str, scope: &str) -> Result<HeaderValue> {
    Ok(HeaderValue::try_from(format!("Bearer {}", site.token(sub, scope)))?)
}

fn is_terminal(state: &str) -> bool {
    matches!(state, "PAID" | "REJECTED" | "EXPIRED" | "CANCELLED" | "REFUNDED")
}
