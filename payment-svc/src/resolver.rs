//! Drives what is open to a known outcome: charges without an answer, voids and refunds that the provider has yet to
//! confirm, and all that an earlier life of this process left behind.
//!
//! Each is asked about on a task of its own, so that one silent payment delays no other; due times are columns, so that
//! a restart forgets nothing, and a lease keeps two processes from asking the same.

use std::{sync::Arc, time::Duration};

use mesh::lifecycle::Lifecycle;
use tokio::sync::Semaphore;

use crate::payments::Payments;

/// How often to look for what is due: as often as a buyer's charge is asked about at first.
const EVERY: Duration = Duration::from_millis(250);

/// Charges asked about at once. Each takes the provider's timeout at worst.
const AT_ONCE: usize = 256;

/// When somebody else may ask. Longer than two calls that time out.
const LEASE_MS: i64 = 10_000;

/// Runs until the soft stop.
pub(crate) fn start(payments: Payments, life: &Lifecycle) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let tasks = life.clone();
    life.spawn_periodic("payment resolver", EVERY, move || {
        let (payments, places, tasks) = (payments.clone(), places.clone(), tasks.clone());
        async move {
            let free = places.available_permits();
            if free == 0 {
                return;
            }
            let now_ms = payments.clock.now_ms();
            let due = match payments.store.take_due(now_ms, now_ms + LEASE_MS, free as u64).await {
                Ok(due) => due,
                Err(error) => {
                    tracing::warn!(%error, "open payments could not be read");
                    return;
                }
            };
            for open in due {
                let Ok(place) = places.clone().try_acquire_owned() else { break };
                let payments = payments.clone();
                tasks.spawn(async move {
                    let payment_id = open.charge.payment_id.clone();
                    match payments.drive(open, true).await {
                        Ok(answer) => tracing::debug!(%payment_id, state = answer.state.as_str_name(), "asked"),
                        // The lease runs out, and it is asked again.
                        Err(error) => tracing::warn!(%error, %payment_id, "an open payment could not be resolved"),
                    }
                    drop(place);
                });
            }
        }
    });
}
