-- Tells a hub where the stream is; founds one where there is none, or where it lost what the hub knows.
-- KEYS 1 meta, 2 stream
-- ARGV 1 known epoch, 2 known head, 3 life of Redis in which the hub joined before, 4 this life, 5 fresh epoch
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'head', 'run', 'base')
local epoch, head, base = meta[1], meta[2] or '0', meta[4] or '0'
if epoch and meta[3] ~= ARGV[4] then
  -- A copy may have taken over that lacks what came last: whoever knew more must find out, even if more came since.
  base = head
  redis.call('HSET', KEYS[1], 'run', ARGV[4], 'base', base)
end
local sound = ARGV[3] == ARGV[4] and head or base
if not epoch or (epoch == ARGV[1] and tonumber(sound) < tonumber(ARGV[2])) then
  epoch, head = ARGV[5], '0'
  redis.call('DEL', KEYS[2])
  redis.call('HSET', KEYS[1], 'epoch', epoch, 'head', '0', 'run', ARGV[4], 'base', '0')
end
return epoch .. ' ' .. head
