-- ARGV: (kind, hold, buyer, quantity, sequence, grant epoch) for each refund, in the outbox's order; kind r is a
-- stock release, p a permit refund. Answers: R before, R after, then A, I or D for each.
local open = is_open()
local epoch, snapshot = get('epoch'), number('snapshot')
local before = number('free') or 0
local free, granted = before, number('granted') or 0

local function refund_release(hold, buyer, quantity, sequence, grant_epoch)
  local counted_before = redis.call('HGET', DONE, hold) == 'r'
  -- Only the grant that the hold consumed: one of another epoch is refunded as the permit it is.
  local listed = redis.call('HGET', GRANTS, hold)
  if listed and parse_grant(listed).epoch == grant_epoch then unlist(hold) end
  redis.call('HSET', DONE, hold, 'r')
  if counted_before or tonumber(sequence) <= snapshot then return 'I' end
  free = free + quantity
  if buyer ~= '' then count_out(buyer, quantity, hold) end
  return 'A'
end

local function refund_permit(hold, grant_epoch)
  -- A grant of another epoch went with it. No tombstone either: the order may acquire anew in this one.
  if grant_epoch ~= epoch then return 'I' end
  redis.call('HSETNX', DONE, hold, 'p')
  local listed = redis.call('HGET', GRANTS, hold)
  if not listed then return 'I' end
  local grant = parse_grant(listed)
  if grant.epoch ~= grant_epoch then return 'I' end
  unlist(hold)
  free = free + grant.quantity
  granted = granted - grant.quantity
  count_out(grant.buyer, grant.quantity, hold)
  return 'A'
end

local results = { 0, 0 }
for i = 1, #ARGV, 6 do
  local result = 'D'
  if open then
    if ARGV[i] == 'r' then
      result = refund_release(ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3]), ARGV[i + 4], ARGV[i + 5])
    else
      result = refund_permit(ARGV[i + 1], ARGV[i + 5])
    end
  end
  results[#results + 1] = result
end
if open then redis.call('HSET', HEADER, 'free', int(free), 'granted', int(granted)) end
results[1], results[2] = int(before), int(free)
return results
