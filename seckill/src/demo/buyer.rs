//! What one buyer does: wants a unit, tries again while units may come back, and then pays, declines, cancels or
//! walks away. All through the public API, with one idempotency key per intent.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode};
use mesh::identity::Minter;
use tokio::time::Instant;
use uuid::Uuid;

use super::{
    client::{Answer, Client, Turn},
    report::Tally,
};
use crate::tools;

/// What a buyer does once it holds a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Temper {
    /// Pays at once.
    Pays,
    /// Its card is declined; the hold runs out.
    Declines,
    /// Gives the unit back.
    Cancels,
    /// Closes the browser; the hold runs out.
    WalksAway,
}

/// Who the buyers are. Their tokens are minted when they are needed: a hundred thousand kept ones would be most of what
/// the crowd weighs.
#[derive(Debug)]
pub struct Identities {
    /// Mints tokens that the gateway takes.
    pub minter: Minter,
    /// Tells this run's buyers from another's.
    pub run: String,
}

impl Identities {
    /// The token of one buyer, as its header has it.
    pub fn token(&self, buyer: u32) -> anyhow::Result<HeaderValue> {
        self.mint(&format!("buyer-{}-{buyer}", self.run), "buyer")
    }

    /// A token, as its header has it.
    pub fn mint(&self, sub: &str, scope: &str) -> anyhow::Result<HeaderValue> {
        let token = tools::mint(&self.minter, sub, scope, Duration::from_secs(24 * 3600))?;
        Ok(HeaderValue::try_from(format!("Bearer {token}"))?)
    }
}

/// Everything the buyers share.
#[derive(Debug)]
pub struct Rush {
    /// Who they are.
    pub identities: Identities,
    /// Connections for placing.
    pub client: Client,
    /// Connections for those who wait for their order to be locked. Browsers do not share connections: whoever is at
    /// one step of a purchase must not queue behind those at another.
    pub waiting: Client,
    /// Connections for those who pay or cancel.
    pub paying: Client,
    /// `sales/…`, the bare id.
    pub sale: String,
    /// When the doors opened.
    pub start: Instant,
    /// Nobody tries for a unit after this.
    pub patience: Instant,
    /// What happened.
    pub tally: Tally,
}

/// One buyer's whole visit, from when it is its turn at the door.
pub async fn visit(rush: Arc<Rush>, turn: Turn, buyer: u32, temper: Temper) -> anyhow::Result<()> {
    let token = rush.identities.token(buyer)?;
    if let Some(order) = acquire(&rush, turn, &token).await {
        // Boxed: of those who come in vain, and are many, none gets here.
        Box::pin(purchase(&rush, order, buyer, token, temper)).await;
    }
    Ok(())
}

/// What a buyer does with its order.
async fn purchase(rush: &Rush, order: String, buyer: u32, token: HeaderValue, temper: Temper) {
    let path = format!("/v1/{order}");
    let placed = Instant::now();
    let Some(state) = leaves_placed(rush, &path, &token).await else { return };
    if state != "AWAITING_PAYMENT" {
        rush.tally.ended(&state);
        return;
    }
    rush.tally.locked(rush.start, placed);
    let ended = match temper {
        Temper::Pays => pay(rush, &path, &token, "sim_approve").await,
        Temper::Declines => {
            pay(rush, &path, &token, "sim_decline").await;
            None
        }
        Temper::Cancels => {
            let answer = insist(rush, &rush.paying, Method::POST, &format!("{path}:cancel"), &token, None, "{}").await;
            answer.map(|a| state_of(&a))
        }
        Temper::WalksAway => None,
    };
    // Who does not wait for the end is asked for at the end.
    match ended {
        Some(state) if is_terminal(&state) => rush.tally.ended(&state),
        _ => rush.tally.left_open(order, buyer),
    }
}

/// Tries until there is an order, the sale is over, or patience is. The key stays the same throughout: it is one
/// intent, and a retry after an unknown outcome must be the same order.
async fn acquire(rush: &Rush, first_turn: Turn, token: &HeaderValue) -> Option<String> {
    let key = Uuid::now_v7().to_string();
    let body = Bytes::from(format!(r#"{{"sale":"{}","quantity":1}}"#, rush.sale));
    let mut pause = Duration::from_millis(300);
    // Everybody pressed the button when the doors opened; what was waited for a turn since counts.
    let (mut sent, mut turn) = (rush.start, Some(first_turn));
    loop {
        let turn = match turn.take() {
            Some(turn) => turn,
            None => rush.client.turn().await.ok()?,
        };
        let sending = rush.client.send_in(turn, Method::POST, "/v1/orders", token, Some(&key), Some(body.clone()));
        let answer = sending.await;
        let hint = match answer {
            Ok(answer) if answer.status == StatusCode::ACCEPTED || answer.status == StatusCode::OK => {
                rush.tally.accepted(rush.start, sent);
                return Some(answer.order().name.to_owned());
            }
            Ok(answer) => {
                let reason = answer.reason();
                rush.tally.refused(&reason, sent);
                let may_help = matches!(answer.status.as_u16(), 429 | 503 | 504) || reason == "SALE_NOT_STARTED";
                if !may_help {
                    return None;
                }
                answer.retry_after
            }
            Err(_) => {
                rush.tally.refused("NO_ANSWER", sent);
                None
            }
        };
        // Spread out and growing, so that a crowd told the same thing does not come back as one.
        let wait = pause.max(hint.unwrap_or_default()).mul_f64(rand::random_range(0.5..1.5));
        if Instant::now() + wait > rush.patience {
            rush.tally.gave_up();
            return None;
        }
        tokio::time::sleep(wait).await;
        sent = Instant::now();
        pause = (pause * 2).min(Duration::from_secs(8));
    }
}

/// Waits until the order is locked or refused.
async fn leaves_placed(rush: &Rush, path: &str, token: &HeaderValue) -> Option<String> {
    loop {
        let path = format!("{path}?wait=2s");
        let answer = insist(rush, &rush.waiting, Method::GET, &path, token, None, "").await?;
        let state = state_of(&answer);
        if state != "PLACED" {
            return Some(state);
        }
    }
}

async fn pay(rush: &Rush, path: &str, token: &HeaderValue, method: &str) -> Option<String> {
    let key = Uuid::new_v4().to_string();
    let body = format!(r#"{{"paymentMethod":"{method}"}}"#);
    let sent = Instant::now();
    let answer = insist(rush, &rush.paying, Method::POST, &format!("{path}:pay"), token, Some(&key), &body).await?;
    if answer.status == StatusCode::OK {
        let state = state_of(&answer);
        if state == "PAID" {
            rush.tally.paid(sent);
        }
        Some(state)
    } else {
        rush.tally.not_paid(&answer.reason());
        None
    }
}

/// Sends until there is an answer that is not "try again". Only for what is safe to repeat, which is everything here.
pub async fn insist(
    rush: &Rush,
    client: &Client,
    method: Method,
    path: &str,
    token: &HeaderValue,
    key: Option<&str>,
    body: &str,
) -> Option<Answer> {
    let mut pause = Duration::from_millis(200);
    for _ in 0..60 {
        let body = (!body.is_empty()).then(|| Bytes::copy_from_slice(body.as_bytes()));
        match client.send(method.clone(), path, token, key, body).await {
            Ok(answer) if !matches!(answer.status.as_u16(), 429 | 503 | 504) => return Some(answer),
            Ok(answer) => rush.tally.retried(&answer.reason()),
            Err(_) => rush.tally.retried("NO_ANSWER"),
        }
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.5))).await;
        pause = (pause * 2).min(Duration::from_secs(2));
    }
    None
}

/// The order's state.
pub fn state_of(answer: &Answer) -> String {
    match answer.order().state {
        "" => "UNKNOWN".to_owned(),
        state => state.to_owned(),
    }
}

/// Whether nothing more comes of it.
pub fn is_terminal(state: &str) -> bool {
    matches!(state, "PAID" | "REJECTED" | "EXPIRED" | "CANCELLED" | "REFUNDED")
}
